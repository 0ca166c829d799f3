"""Bring-up: embedded engines, Ray, the actors and the Gateway, from one command."""
