"""Alerts as data: rules from TOML, a pure state machine, `trace.alert` envelopes and signed webhooks.

`rules` reads and checks what is asked for, `measure` asks the store, `machine` decides for one group, `engine` for
everything, `control` is what operators do (list, status, silence, delete), `webhook` delivers, `service` is the loop.
Promises: a rule that cannot work is refused at load; state is saved before anything is said, so that a crash neither
says a thing twice nor forgets it; every firing has one resolved; what is unknown is no data, never zero.
"""
