"""The embedded RGB-D world: scenes, questions about them, and the tiny model that learns there."""
