"""What is read and refused before a weight is loaded."""
