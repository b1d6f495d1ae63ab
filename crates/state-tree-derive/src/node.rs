//! `StateNode`: a struct as a node, an enum as a choice of nodes.

use crate::attributes::{doc, kebab, legal_compatible, legal_name, not_generic, state};
use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{Data, DataEnum, DeriveInput, Error, Fields, Ident, Result, Type};

pub(crate) fn derive(input: &DeriveInput) -> Result<TokenStream> {
    not_generic(input)?;
    match &input.data {
        Data::Struct(data) => of_struct(input, &data.fields),
        Data::Enum(data) => of_enum(input, data),
        Data::Union(_) => Err(Error::new(input.ident.span(), "a union cannot be a node")),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Property,
    Child,
    Children,
}

struct Field<'i> {
    ident: &'i Ident,
    ty: &'i Type,
    role: Role,
    /// In the tree.
    name: String,
    doc: String,
}

fn fields(fields: &Fields) -> Result<Vec<Field<'_>>> {
    let named = match fields {
        Fields::Named(named) => &named.named,
        Fields::Unit => return Ok(Vec::new()),
        Fields::Unnamed(unnamed) => {
            return Err(Error::new(
                unnamed.span(),
                "the fields of a node need names",
            ));
        }
    };
    let mut list: Vec<Field<'_>> = Vec::new();
    for field in named {
        let Some(ident) = &field.ident else { continue };
        let state = state(&field.attrs, &["child", "children", "rename"])?;
        let role = match (state.child, state.children) {
            (false, false) => Role::Property,
            (true, false) => Role::Child,
            (false, true) => Role::Children,
            (true, true) => {
                return Err(Error::new(
                    ident.span(),
                    "either `child` or `children`, not both",
                ));
            }
        };
        let name = state
            .rename
            .map_or_else(|| kebab(&ident.to_string()), |r| r.value());
        let name = legal_name(name, ident)?;
        if list.iter().any(|f| f.name == name) {
            return Err(Error::new(
                ident.span(),
                format!("two fields are called `{name}`"),
            ));
        }
        list.push(Field {
            ident,
            ty: &field.ty,
            role,
            name,
            doc: doc(&field.attrs),
        });
    }
    Ok(list)
}

impl Field<'_> {
    /// The trait that carries the field.
    fn as_field(&self) -> TokenStream {
        let ty = self.ty;
        match self.role {
            Role::Property => {
                quote_spanned!(ty.span()=> <#ty as ::outlive_state_tree::PropertyField>)
            }
            Role::Child => quote_spanned!(ty.span()=> <#ty as ::outlive_state_tree::ChildField>),
            Role::Children => {
                quote_spanned!(ty.span()=> <#ty as ::outlive_state_tree::ChildrenField>)
            }
        }
    }

    fn schema(&self) -> TokenStream {
        let (name, doc, carrier) = (&self.name, &self.doc, self.as_field());
        let arity = match self.role {
            Role::Property => {
                return quote! {
                    ::outlive_state_tree::PropertySchema {
                        name: #name,
                        doc: #doc,
                        value_type: #carrier::value_type(),
                        required: #carrier::REQUIRED,
                    }
                };
            }
            Role::Child => quote!(#carrier::ARITY),
            Role::Children => quote!(::outlive_state_tree::Arity::Many),
        };
        quote! {
            ::outlive_state_tree::ChildSchema {
                name: #name,
                doc: #doc,
                arity: #arity,
                schema: #carrier::schema,
            }
        }
    }

    fn encode(&self) -> TokenStream {
        let (ident, name, carrier) = (self.ident, &self.name, self.as_field());
        quote!(#carrier::put(&self.#ident, writer, #name)?;)
    }

    fn decode(&self) -> TokenStream {
        let (ident, name, ty) = (self.ident, &self.name, self.ty);
        let take = match self.role {
            Role::Property => quote!(property),
            Role::Child => quote!(child),
            Role::Children => quote!(children),
        };
        quote_spanned!(ty.span()=> #ident: fields.#take::<#ty>(#name)?,)
    }
}

fn of_struct(input: &DeriveInput, data: &Fields) -> Result<TokenStream> {
    let literal = state(&input.attrs, &["compatible"])?
        .compatible
        .ok_or_else(|| {
            Error::new(
                input.ident.span(),
                "a node needs #[state(compatible = \"outlive,…-v1\")]",
            )
        })?;
    let compatible = legal_compatible(&literal)?;
    let all = fields(data)?;
    // The format demands that properties come before children, whatever the order of the fields.
    let (properties, children): (Vec<_>, Vec<_>) =
        all.iter().partition(|f| f.role == Role::Property);
    let property_schemas = properties.iter().map(|f| f.schema());
    let child_schemas = children.iter().map(|f| f.schema());
    let encode = properties.iter().chain(&children).map(|f| f.encode());
    let decode = properties.iter().chain(&children).map(|f| f.decode());
    let (name, type_name, doc) = (&input.ident, input.ident.to_string(), doc(&input.attrs));
    Ok(quote! {
        #[automatically_derived]
        impl ::outlive_state_tree::StateNode for #name {
            fn schema() -> ::outlive_state_tree::Schema {
                ::outlive_state_tree::Schema::Node(::outlive_state_tree::NodeSchema {
                    type_name: ::core::concat!(::core::module_path!(), "::", #type_name),
                    compatible: #compatible,
                    doc: #doc,
                    properties: ::std::vec![#(#property_schemas),*],
                    children: ::std::vec![#(#child_schemas),*],
                })
            }
            fn accepts(compatible: &str) -> bool {
                compatible == #compatible
            }
            fn encode(
                &self,
                writer: &mut ::outlive_state_tree::Writer,
                name: &str,
            ) -> ::core::result::Result<(), ::outlive_state_tree::WriteError> {
                writer.begin(name, #compatible)?;
                #(#encode)*
                writer.end()
            }
            fn decode(
                node: &::outlive_state_tree::Node<'_>,
                at: &::outlive_state_tree::Place<'_>,
            ) -> ::core::result::Result<Self, ::outlive_state_tree::ShapeError> {
                #[allow(unused_mut)]
                let mut fields = ::outlive_state_tree::Fields::open(node, at, #compatible)?;
                let this = Self { #(#decode)* };
                fields.finish(<Self as ::outlive_state_tree::StateNode>::schema)?;
                ::core::result::Result::Ok(this)
            }
        }
    })
}

fn of_enum(input: &DeriveInput, data: &DataEnum) -> Result<TokenStream> {
    state(&input.attrs, &[])?;
    let mut idents = Vec::new();
    let mut types = Vec::new();
    for variant in &data.variants {
        state(&variant.attrs, &[])?;
        match &variant.fields {
            Fields::Unnamed(fields) if fields.unnamed.len() == 1 => {
                idents.push(&variant.ident);
                types.extend(fields.unnamed.iter().map(|f| &f.ty));
            }
            _ => {
                return Err(Error::new(
                    variant.ident.span(),
                    "each variant holds exactly one node: `Pipe(PipeState)`",
                ));
            }
        }
    }
    if idents.is_empty() {
        return Err(Error::new(
            input.ident.span(),
            "an enum without variants is no choice",
        ));
    }
    let carriers: Vec<_> = types
        .iter()
        .map(|ty| quote_spanned!(ty.span()=> <#ty as ::outlive_state_tree::StateNode>))
        .collect();
    let name = &input.ident;
    Ok(quote! {
        #[automatically_derived]
        impl ::outlive_state_tree::StateNode for #name {
            fn schema() -> ::outlive_state_tree::Schema {
                ::outlive_state_tree::Schema::OneOf(::std::vec![#(#carriers::schema()),*])
            }
            fn accepts(compatible: &str) -> bool {
                #(#carriers::accepts(compatible))||*
            }
            fn encode(
                &self,
                writer: &mut ::outlive_state_tree::Writer,
                name: &str,
            ) -> ::core::result::Result<(), ::outlive_state_tree::WriteError> {
                match self {
                    #(Self::#idents(node) => #carriers::encode(node, writer, name),)*
                }
            }
            fn decode(
                node: &::outlive_state_tree::Node<'_>,
                at: &::outlive_state_tree::Place<'_>,
            ) -> ::core::result::Result<Self, ::outlive_state_tree::ShapeError> {
                #(if #carriers::accepts(&node.compatible) {
                    return #carriers::decode(node, at).map(Self::#idents);
                })*
                let known = <Self as ::outlive_state_tree::StateNode>::schema().compatibles();
                ::core::result::Result::Err(::outlive_state_tree::wrong_kind(node, at, &known))
            }
        }
    })
}
