"""What the three notebooks share: the method, file by file, and three rooms."""
