"""When to re-plan, and what algorithms are told: controller, schedule, passes over ordered samples, loss cache."""
