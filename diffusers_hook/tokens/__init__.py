"""What is known of the tokens of a generation: salient ones, groups, guidance branches."""
