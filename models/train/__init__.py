"""How the reference models were trained: needs the `train` extra (torch), nothing else imports this."""
