"""What models lose against each other on the same tokens."""
