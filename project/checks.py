"""Django system checks of our own settings, each with an id and a hint."""
