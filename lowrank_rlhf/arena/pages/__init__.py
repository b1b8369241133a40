"""What a person sees in the browser: gradio components over an Arena, no logic of their own."""
