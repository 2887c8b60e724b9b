"""What an operator does beside the running daemon: look whether all is well, save, restore, clear up."""
