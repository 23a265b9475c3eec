"""Results of `calm.paper.experiments` as figures, tables, one HTML page and coloured text.

figures   matplotlib: each figure as SVG and PNG, and as SVG inside the page
tables    CSV, Markdown and cells for the page
document  task reports -> sections of figures, tables and examples
page      sections -> one self-contained HTML file
terminal  the main table and the coloured examples in a terminal
"""
