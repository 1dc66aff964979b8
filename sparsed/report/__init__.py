"""What a run's record says, in lines and as a page."""
