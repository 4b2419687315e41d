"""A page from a file to an adapter: it starts commands of halfbyte, and reads what they leave."""
