"""Pictures: of tables, of patterns and of weights, in one style; they never compute what they show."""
