"""streamfs."""
