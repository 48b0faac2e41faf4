"""Saves that are durable before they are visible, and their strict loading."""
