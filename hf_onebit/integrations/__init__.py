"""Introductions to other libraries; each file imports the library it is named after."""
