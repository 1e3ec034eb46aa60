"""What holds for every test: hypothesis judges laws, never the speed of a loaded machine."""

from hypothesis import HealthCheck, settings

settings.register_profile("qlora", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("qlora")
