"""What holds the processes of a run together: signals, the vote on where to stop, and an end that all of them share."""
