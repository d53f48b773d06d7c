"""What a plan costs at sizes that were not captured."""
