"""How quiet the machine was while something was measured."""
