"""Tell browsers and screen readers the language of the pages in Spanish."""


def on_post_page(output: str, page, config) -> str:
    """Return a page with its own language in the place of the theme's."""
    spanish = "/es/" in page.file.src_uri
    return output.replace('<html lang="en"', '<html lang="es"', 1) if spanish else output
