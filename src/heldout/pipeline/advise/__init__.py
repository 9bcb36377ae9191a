"""What to do with a file before anything is trained: what it is, what it can show, what a job would cost."""
