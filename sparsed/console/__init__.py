"""What every command line here shares: its flags, what it prints, the files it writes, how it ends."""
