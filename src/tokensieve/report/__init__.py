"""Pictures of a comparison: overlays (``overlay``), curves (``plots``), and the page (``html``)."""
