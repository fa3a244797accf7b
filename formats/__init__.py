"""What the input is: instances, files of them, scenes; and what is wrong with it."""
