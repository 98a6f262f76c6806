"""Settings of hypothesis, which only the tests of this folder need."""

from hypothesis import HealthCheck, settings

# Derandomized: the same examples on every run and machine, so that a red test is a changed program.
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")
