"""What a format costs a model: loss per layer, bit budgets, the report page."""
