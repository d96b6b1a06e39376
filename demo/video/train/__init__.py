"""How the shipped video model was made."""
