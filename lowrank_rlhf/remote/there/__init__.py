"""What runs on the other machine: sent with every request, of the standard library alone, for Python 3.8 and later."""
