"""Plans as data: grids of ranks, who holds what, routes and schedules. No torch."""
