"""Models of the layers here, and the way of Hugging Face's weights into them."""
