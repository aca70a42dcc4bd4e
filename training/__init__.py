"""Train every report's network by its own recipe, and better ones of ours."""
