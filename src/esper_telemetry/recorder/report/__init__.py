"""Recordings of the flight recorder, shown to a person."""
