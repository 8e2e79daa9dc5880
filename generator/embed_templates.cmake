# Writes a C++ file that defines flash_attn_jit::embedded_templates() from the texts of the device templates.
# Run as: cmake -DOUTPUT=<file.cpp> -DTEMPLATES=<a.cuh|b.cuh|...> -P embed_templates.cmake
string(REPLACE "|" ";" TEMPLATES "${TEMPLATES}")

set(text "// Generated from the files in templates/ by generator/embed_templates.cmake.\n")
string(APPEND text "#include \"generator/render.h\"\n\nnamespace flash_attn_jit {\n\n")
string(APPEND text "const TemplateSet& embedded_templates() {\n  // Never destroyed: threads may still render while the process ends.\n  static const TemplateSet& templates = *new TemplateSet{\n")
foreach(path IN LISTS TEMPLATES)
  get_filename_component(name "${path}" NAME)
  file(READ "${path}" content)
  if(content MATCHES "\\)_template_\"")
    message(FATAL_ERROR "${path} holds )_template_\", the mark that ends its string literal in ${OUTPUT}")
  endif()
  string(APPEND text "      {\"${name}\", R\"_template_(")
  string(APPEND text "${content}")
  string(APPEND text ")_template_\"},\n")
endforeach()
string(APPEND text "  };\n  return templates;\n}\n\n}  // namespace flash_attn_jit\n")
file(WRITE "${OUTPUT}" "${text}")
