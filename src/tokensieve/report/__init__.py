"""What a comparison looks like: overlays (``overlay``), curves (``plots``), and the page (``html``)."""
