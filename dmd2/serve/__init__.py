"""A page and an HTTP API that draw with packages: `request` checks what is asked, `drawing` draws it, `result` writes it down, `page` shows it."""
