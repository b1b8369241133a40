"""What a recipe will take, before it runs: peak memory by phase and component, and what would make it fit."""
