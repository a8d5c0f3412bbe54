"""`mpl reproduce`: experiments over seeds, into one table each."""
