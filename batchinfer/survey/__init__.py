"""What ``plan`` tells before the money is spent: token lengths, bad rows, duplicates, memory fit, time and cost."""
