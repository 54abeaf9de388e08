"""What scripts/bench is made of: `origin` serves, `contenders` mount, `work` is timed, `cases` compare, `report`
tells."""
