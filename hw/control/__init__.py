"""Control: instruction decoder, operand checks, scalar core, in-order queues and the hazard scoreboard."""
