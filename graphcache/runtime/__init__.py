"""What runs at every call: steps told, branches kept apart, phases fed, caches kept."""
