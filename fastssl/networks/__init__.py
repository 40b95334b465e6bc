"""What networks are built from and how views go through them."""
