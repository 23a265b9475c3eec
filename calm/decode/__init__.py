"""Prompts to generations: the loop, compiled programs, engines, pools of rows."""
