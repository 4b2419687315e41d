"""What differs from one system to the next: calls that not every one has, and a table of what runs where. No torch."""
