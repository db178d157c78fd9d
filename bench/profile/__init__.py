"""Why a step takes its time: counts, ceilings, traces, and one sentence on the bottleneck."""
