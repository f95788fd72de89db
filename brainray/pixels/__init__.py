"""Encoded bytes become pixels here, and pixels become network input: one room for every door."""
