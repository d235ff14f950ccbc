"""The error tree that services raise and clients receive."""
