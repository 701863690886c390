"""Qualification: playbooks of scenarios, oracles that judge the answers, a runner whose children may crash, two scores."""
