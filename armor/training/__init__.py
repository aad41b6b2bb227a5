"""What refine and tune share: layers that can be trained, the loop that trains them, the text for it."""
