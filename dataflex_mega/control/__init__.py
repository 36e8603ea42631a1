"""When to re-plan, and with which algorithms: controllers, update schedules, ordered passes, the loss cache."""
